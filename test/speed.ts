// node build.mjs --run test/speed.ts: .github/speed.svg, from the measurements in the README.
import { readFileSync, writeFileSync } from "node:fs";
import { speedPicture } from "./support/speed.ts";

writeFileSync(".github/speed.svg", speedPicture(readFileSync("README.md", "utf8")));
