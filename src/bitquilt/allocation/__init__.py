"""Where the bits go: from costs and a budget to a plan. Pure Python."""
