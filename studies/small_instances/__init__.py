"""How far plans are from the optimum of small instances, by the idle time of a mean request.

``instances`` draws them, ``layer_tables`` and ``optimum`` find the optimum by an integer program,
``gap`` scores a solver's plan beside it, ``record`` keeps what was found in
``studies/small_instances.json``. ``python -m studies.small_instances`` runs them.
"""
