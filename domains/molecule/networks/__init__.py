"""Networks of the domain: an equivariant one, a transformer, EDM, and what surrounds them."""
