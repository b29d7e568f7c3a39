"""Reinforcement learning from rewards: answers by the live weights, their rewards, advantages, frozen models."""
