"""Proofs that no perturbation changes an answer: randomised smoothing, and bounds on what a network may answer."""
