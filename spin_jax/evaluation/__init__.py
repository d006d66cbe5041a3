"""Scoring: log-probs of responses, and what is computed from them."""
