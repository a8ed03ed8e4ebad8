"""Parameters that are cut over ranks: where their parts lie, who takes their directions, and how they travel."""
