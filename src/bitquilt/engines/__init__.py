"""The file formats of other engines: what each can hold, and how a stored weight gets there. Tensors and values only;
`bitquilt.exporter` writes the files."""
