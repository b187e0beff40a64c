"""SliM-LLM (arXiv 2405.14917) and SliM-LLM+."""
