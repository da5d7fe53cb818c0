"""Adapters as values: operations that make a new adapter out of finished ones, or out of a tuned checkpoint.

Two spaces, never mixed. In the space of *changes* an adapter is what it does to each weight, dW = W' - W: `combine`,
`subtract`, `extract`, `similarity`; the result is plain LoRA. In the space of *parameters* it is its own tensors:
`average`, `arithmetic`, `scale`; the result is of the same method. The two differ: (A + A')(B + B') has cross terms.
"""
