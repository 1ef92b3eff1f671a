"""Shards in, samples out: tar → index → order → sample, each a pure function of what came before."""
