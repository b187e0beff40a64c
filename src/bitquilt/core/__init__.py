"""The nouns every room shares: stored weights, recipes as a protocol, packing, plan files, budgets, events, units."""
