// The front page: what it says of options is the option table, and its commands are ones that the program takes.
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { test } from "node:test";
import { internals } from "../imgpull.ts";

const readme = readFileSync("README.md", "utf8");

test("the options table has every option, in the program's own words", () => {
  const rows = internals.OPTIONS.map(({ name, short, value, help }) => {
    const forms = `${short ? `-${short}, ` : ""}--${name}${value ? ` ${value}` : ""}`;
    return `| \`${forms.replaceAll("|", "\\|")}\` | ${help.replaceAll("|", "\\|")} |`;
  });
  const table = readme.split("\n").filter((line) => /^\| `-/.test(line));
  assert.deepEqual(table, rows);
});

test("every imgpull command in it is one that the program takes", () => {
  const blocks = [...readme.matchAll(/```sh\n([^]*?)```/g)].map(([, block = ""]) => block);
  const lines = blocks.flatMap((block) => block.split("\n"));
  const commands = lines.flatMap((line) => /\b(?:imgpull|node dist\/imgpull\.cjs|node -) ([^#|&<>]*)/.exec(line)?.[1] ?? []);
  assert.ok(commands.length >= 7, `only ${commands.length} commands found`);
  for (const command of commands) {
    const line = internals.parseCommandLine(command.trim().split(/\s+/));
    const { images, from } = internals.planCommand(line);
    assert.ok(images.length > 0 || from !== undefined, command);
    for (const image of images) internals.parseReference(image);
  }
});

test("the files that it links to are there", () => {
  const links = [...readme.matchAll(/\]\((?!https?:)([^)#]+)\)/g)].map(([, link = ""]) => link);
  assert.ok(links.length > 3);
  for (const link of links) assert.ok(existsSync(link), link);
});
