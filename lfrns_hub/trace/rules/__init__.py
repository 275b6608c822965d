"""Effect of each operation on the axes that carry units: one rule per operation, registered by its ATen name."""
