"""Models trained again: trainers for banks, exact removal, and other truths that forecasts are compared with.

One package for each framework; a package of gradients (`headwater.torch`, ...) imports nothing from here.
"""
