// The bars on the front page, from the first table of measurements there: a picture that says other
// than the table is no longer that of `node build.mjs --run test/speed.ts`, which a test sees.

const WIDTH = 640;
const ROW = 30;
const BARS_AT = 170;
const LONGEST = WIDTH - BARS_AT - 70;

const STYLE = `
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .other { fill: #afb8c1 } .ours { fill: #1a7f37 } .bold { font-weight: 600 }
  @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .other { fill: #484f58 } .ours { fill: #3fb950 } }`;

interface Bar {
  program: string;
  seconds: number;
}

/** The first row of the first table of measurements: programs are its columns. */
function barsOf(readme: string): Bar[] {
  const [, measured = ""] = readme.split("<!-- measured: begin -->");
  const rows = measured.split("\n").filter((line) => line.startsWith("|"));
  const cells = (row = "") =>
    row
      .split("|")
      .slice(2, -1)
      .map((cell) => cell.trim());
  const programs = cells(rows[0]);
  const times = cells(rows[2]);
  return programs.flatMap((program, column) => {
    const seconds = parseFloat(times[column] ?? "");
    return Number.isNaN(seconds) ? [] : [{ program, seconds }];
  });
}

export function speedPicture(readme: string): string {
  const bars = barsOf(readme);
  const slowest = Math.max(...bars.map(({ seconds }) => seconds));
  const height = bars.length * ROW + 10;
  const rows = bars.map(({ program, seconds }, index) => {
    const y = 5 + index * ROW;
    const width = ((seconds / slowest) * LONGEST).toFixed(1);
    const isOurs = program === "imgpull";
    const weight = isOurs ? ' class="bold"' : "";
    return [
      `  <text x="${BARS_AT - 12}" y="${y + 20}" text-anchor="end"${weight}>${program}</text>`,
      `  <rect class="${isOurs ? "ours" : "other"}" x="${BARS_AT}" y="${y + 5}" width="${width}" height="20" rx="3"/>`,
      `  <text x="${BARS_AT + Number(width) + 8}" y="${y + 20}"${weight}>${seconds.toFixed(1)} s</text>`,
    ].join("\n");
  });
  const label = bars.map(({ program, seconds }) => `${program} ${seconds} s`).join(", ");
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" role="img" aria-label="${label}">
<style>${STYLE}
</style>
${rows.join("\n")}
</svg>
`;
}
