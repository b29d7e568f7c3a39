"""How good a trained model is: losses, log-likelihoods and answers, in the layout in which the model trains."""
