"""Where the bits of a whole model go: sizes, sensitivities, the planner."""
