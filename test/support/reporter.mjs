// What build.mjs prints when all runs of the tests are over: how many there were, and the ones that failed, with their
// reasons. A reporter of node:test, beside the one that a person reads.

/** A failure whose reason is told at a test inside it. */
const isOfChildren = (error) => error?.failureType === "subtestsFailed";

function reasonOf(error) {
  const cause = error?.cause ?? error;
  const text = String(cause?.message ?? cause);
  const place = /^ *at .*?([\w./-]*test[\w./-]*\.ts:\d+)/m.exec(cause?.stack ?? "")?.[1];
  return place === undefined ? text : `${text}\n(${place})`;
}

export default async function* report(events) {
  const sum = { passed: 0, failed: 0, skipped: 0, failures: [] };
  for await (const { type, data } of events) {
    if (type !== "test:pass" && type !== "test:fail") continue;
    const { name, skip, details } = data;
    const isSuite = details?.type === "suite";
    const isFailed = type === "test:fail";
    if (isFailed && !isOfChildren(details?.error))
      sum.failures.push({ name, reason: reasonOf(details?.error) });
    if (isSuite) continue;
    if (skip !== undefined) sum.skipped += 1;
    else if (isFailed) sum.failed += 1;
    else sum.passed += 1;
  }
  yield JSON.stringify(sum);
}
