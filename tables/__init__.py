"""The tables of the agents: what is kept, under which keys, in which form."""
