"""A state machine over every operation of a store: drivers, collections and strangers at once, step by step.

``python -m tests.machine --seed 7 --minutes 60`` goes on for an hour, and prints the shortest program that fails.
"""
