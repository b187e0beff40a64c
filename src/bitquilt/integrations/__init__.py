"""Other people's tools: how they find and load what we write."""
