"""The formats that are read and written: schema, reader and writer of each.

Schemas are pydantic models (:mod:`prism_plan.io.pydantic_base`), and Arrow's for traces; what a
model cannot say, such as which values belong together, the reader checks after it.
"""
