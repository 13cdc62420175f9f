"""A contract type for import-linter: layers in which every package that is not named is a method's room."""

from grimp import ImportGraph, Layer
from importlinter import Contract, ContractCheck, fields, output


class MethodsContract(Contract):
    """Who may import whom, from the top layer to the bottom one; a new method needs no entry.

    Options (names of children of `root`):
        above: layers above the methods, the highest first.
        below: layers below the methods, the highest first; those separated by "|" must not import each other.
    """

    root = fields.StringField()
    above = fields.ListField(subfield=fields.StringField())
    below = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Finds imports that go up, or from one method to another."""
        above, below = (
            [[n.strip() for n in layer.split("|")] for layer in side] for side in (self.above, self.below)
        )
        named = {name for layer in (*above, *below) for name in layer}
        children = {child.rpartition(".")[2] for child in graph.find_children(self.root)}
        missing = sorted(named - children)
        if missing:
            raise ValueError(f"{self.root} has no {', '.join(missing)}: remove them from the contract.")
        methods = sorted(children - named)
        layers = [Layer(*(f"{self.root}.{n}" for n in layer)) for layer in (*above, methods, *below)]
        found = graph.find_illegal_dependencies_for_layers(layers)
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Prints the forbidden imports."""
        for dependency in sorted(check.metadata["found"], key=str):
            output.print_error(f"{dependency.importer} must not import {dependency.imported}:", bold=True)
            for route in dependency.routes:
                chain = [*sorted(route.heads)[:1], *route.middle, *sorted(route.tails)[:1]]
                output.print_error("  " + " -> ".join(chain), bold=False)
