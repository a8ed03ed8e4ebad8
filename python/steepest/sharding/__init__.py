"""Parameters that lie on several ranks: what of a step travels, where matrices are worked on, and what that costs."""
