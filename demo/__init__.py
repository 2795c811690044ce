"""The proof: three hundred real databases, eight real disasters, and a ledger that would know if a row was lost."""
