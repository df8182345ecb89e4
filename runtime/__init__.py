"""Runtime: drives artifacts that offer a step over tokens."""
