"""Plans for the engines that people run already, each in the form that it takes."""
