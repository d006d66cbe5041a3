"""SFT data in, packed batches out: rows, examples, token ids, pairs, rows that several pairs share."""
