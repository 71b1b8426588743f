"""The stage that turns source files into packed rows of tokens with their loss masks."""
