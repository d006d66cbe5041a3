"""The devices: what they are, how arrays lie on them, what their compilers are told."""
