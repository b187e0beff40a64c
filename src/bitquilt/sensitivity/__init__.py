"""Numbers that say what hurts: salience of weights, divergence of outputs."""
