"""Proximal policy optimization for language models, to be read beside Huang et al. (2024).

"The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031. A comment that begins with
`Detail:` names what that paper found to matter, where it is done.

    objective   rewards, advantages and losses: pure functions
    models      policy, critic and reference, and which weights they share
    update      answers that were scored, and the steps that learn from them
    trainer     the run: updates, held-out evaluations, checkpoints
"""
