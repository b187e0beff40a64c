"""Where the bits go: numbers only."""
