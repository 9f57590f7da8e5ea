"""How much memory a forward takes."""

# Tokens that layers which compute every token alone take at once where memory is short. Products of so many rows keep
# a large GPU busy, and at 14B their hidden layer is 0.2 GB.
AT_ONCE = 8192
