"""Small programs as text, for tests of what is read from compiled ones."""

import textwrap

from llmctl.plan.hlo import parser


def module(body, more=""):
    text = textwrap.dedent(more) + "\nENTRY %main (a: f32[2]) -> f32[2] {\n" + textwrap.indent(body.strip(), "  ")
    return text + "\n}\n"


def instruction(line):
    return parser.parse(module(line)).computations["main"].instructions[0]
