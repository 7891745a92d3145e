"""The embedded default: a small LLaVA that was really trained, and miniature benchmarks to try things on."""
