"""Public names of the package and the modules that define them."""

from ._certificate import Certificate as Certificate, Counterexample as Counterexample, LawResult as LawResult
from ._document import RunDocument as RunDocument, dump as dump, load as load
from ._schema import json_schema as json_schema
