"""How the networks of this domain learn: one Lightning module a file."""
