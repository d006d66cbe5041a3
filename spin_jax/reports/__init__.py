"""What a run has shown: tables and plots."""
