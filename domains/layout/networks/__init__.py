"""Networks of the domain: the transformer that generates and the encoder that judges."""
