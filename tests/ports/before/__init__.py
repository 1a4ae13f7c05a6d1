"""The models with the other libraries' quantisers."""
