"""A grid of three short runs, as its TOML file."""

GRID = """
[run]
steps = 3
checkpoint_every = 1
[task]
gym_options = { min_terms = 2, max_terms = 2 }
num_train = 4
num_eval = 4
[grid]
seeds = [1]
variants = [
    { name = "good", method = { name = "grpo" } },
    { name = "bad", method = { name = "ah-grpo" } },
    { name = "torn", method = { name = "sa-ah-grpo" } },
]
"""
