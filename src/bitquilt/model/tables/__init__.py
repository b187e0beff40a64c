"""Tables of rows in few bits, embeddings and heads: one width for all rows, or widths of their own."""
