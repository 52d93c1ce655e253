"""What users' type checkers see."""
