"""Parts that several recipes are composed of."""
