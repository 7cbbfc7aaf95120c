"""What knows the insides of another library, a package each."""
