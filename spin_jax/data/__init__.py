"""SFT data in, token rows out: `sources` reads files, `chat` turns messages into ids, `pairs` makes batches."""
