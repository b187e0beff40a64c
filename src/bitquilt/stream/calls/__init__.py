"""How a model calls its blocks: `recording` listens, `columns` stores what blocks receive besides hidden states,
`routed_inputs` what experts receive."""
