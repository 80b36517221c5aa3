"""Run time: state, step programs and lanes. Importable without torch."""
