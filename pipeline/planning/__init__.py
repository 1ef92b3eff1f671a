"""What a run will take, before it begins: pure arithmetic on a config's sections and on networks without weights."""
