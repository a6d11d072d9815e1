// Lists of images: lines, lock files of PowerShell, and what helm, Compose, kubectl and people
// write as YAML and JSON.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { type ImageList, parseImageList } from "../imgpull.ts";
import { serveBundle } from "./support/bundle.ts";
import { runMain } from "./support/main.ts";

const DIGEST = `sha256:${"a1".repeat(32)}`;

/**
 * As `helm template` prints a chart of the usual make: quoted images, comments of sources, hooks,
 * tests.
 */
const HELM_COMMON = `---
# Source: web/templates/serviceaccount.yaml
apiVersion: v1
kind: ServiceAccount
metadata:
  name: release-web
automountServiceAccountToken: true
---
# Source: web/templates/deployment.yaml
apiVersion: apps/v1
kind: Deployment
metadata:
  name: release-web
  labels:
    app.kubernetes.io/version: "1.16.0"
spec:
  replicas: 1
  template:
    spec:
      initContainers:
        - name: wait
          image: "docker.io/library/busybox:1.37"
          command: ['sh', '-c', "until nslookup db; do echo image: none; sleep 2; done"]
      containers:
        - name: web
          securityContext:
            {}
          image: "nginx:1.16.0"
          imagePullPolicy: IfNotPresent
          ports:
            - name: http
              containerPort: 80
---
# Source: web/templates/tests/test-connection.yaml
apiVersion: v1
kind: Pod
metadata:
  name: "release-web-test-connection"
  annotations:
    "helm.sh/hook": test
spec:
  containers:
    - name: wget
      image: busybox
      command: ['wget']
      args: ['release-web:80']
  restartPolicy: Never
`;

/** A chart with scripts, dashboards and a CRD: most of what says \`image:\` in it is none. */
const HELM_OPERATOR = `# image: commented/out:1
apiVersion: v1
kind: ConfigMap
metadata:
  name: scripts
data:
  setup.sh: |-
    #!/bin/bash
    cat <<EOF
    image: in/a/script:1
    EOF

    image: after/a/blank/line:1
  values.yaml: |
    image: in/values:1
  dashboard.json: >2+
      { "image": "in/a/dashboard:1" }
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
spec:
  versions:
  - name: v1
    schema:
      openAPIV3Schema:
        description: "Operator is
          described with image: in/a/quote:1
          over lines"
        properties:
          image:
            description: 'The image. It''s an
              image: in/a/single/quote:1'
            type: string
          imagePullPolicy:
            type: string
---
apiVersion: apps/v1
kind: StatefulSet
spec:
  template:
    spec:
      containers:
      - image: quay.io/org/operator:v0.80.0@${DIGEST}
        args:
        - --config-reloader-image=quay.io/org/reloader:v0.80.0
        - |
          image: in/a/sequence:1
        name: operator
      - name: sidecar   # image: in/a/comment:1
        image: 'registry.corp:5000/team/side_car.app:2'  # pinned
      volumes:
      - name: scripts
        configMap: { name: scripts }
`;

/**
 * Charts of another make: everything quoted by a function, flow style, null values, keys in quotes.
 */
const HELM_FLOW = `{"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "a", "image": "one.io/a:1"}]}}
---
apiVersion: v1
kind: Pod
spec:
  initContainers: [{ name: x, image: two.io/b:2 }, {image: 'two.io/c:3', name: y}]
  containers:
    - {"name": "not", "args": ["x, image: three.io/no:1"], "image": "three.io/d:4"}
    - "image": four.io/e:5
      resources: {}
    - image: ~
    - image: null
    - image:
    - image: ""
    - image: &main five.io/f:6
    - image: *main
    - image: >-
        six.io/g:7
`;

/** Flow style over several lines, with quotes that are words and words that look like keys. */
const FLOW_LINES = `kind: List
items:
- spec: {containers: [{name: it's, args: ['x, image: in/a/quote:1',
      'two

      image: in/lines:2

      end', "an \\" image: in/double:3"], image: one.io/a:1}, # image: in/a/comment:4
    {image: "two.io/b:2",
     name: y}]}
- image: ['[1, image: in/a/list:5']
- metadata: {image: {tag: x}, name: z}
- {image: three.io/c:3
`;

const COMPOSE = `name: shop
services:
  web:
    build: .
    image: ghcr.io/org/shop:2.1
    depends_on: [db]
    labels:
      - "note=image: not/this:1"
  db:
    image: postgres:17-alpine
    environment:
      POSTGRES_PASSWORD_FILE: /run/secrets/pw
  cache: {image: "redis:7", restart: always}
secrets:
  pw: {file: ./pw}
`;

const KUBECTL_LIST = `apiVersion: v1
items:
- apiVersion: v1
  kind: Pod
  metadata:
    annotations:
      kubectl.kubernetes.io/last-applied-configuration: |
        {"apiVersion":"v1","spec":{"containers":[{"image":"old/one:1"}]}}
    name: a
  spec:
    containers:
    - image: registry.k8s.io/pause:3.10
      imagePullPolicy: IfNotPresent
      name: a
  status:
    containerStatuses:
    - containerID: containerd://abc
      image: registry.k8s.io/pause:3.10
      imageID: registry.k8s.io/pause@${DIGEST}
    - image: ${DIGEST}
      imageID: ""
kind: List
metadata:
  resourceVersion: ""
`;

const KUBECTL_JSON = {
  kind: "List",
  items: [
    {
      metadata: { annotations: { last: '{"image":"old/one:1"}' } },
      spec: {
        initContainers: [{ image: "a:1" }],
        containers: [{ image: "b:2" }, { image: "a:1" }],
      },
      status: { containerStatuses: [{ image: DIGEST, imageID: "x" }] },
    },
    { spec: { image: { repository: "none" }, containers: [{ image: `c/d:3@${DIGEST}` }] } },
  ],
};

const list = (format: ImageList["format"], references: string[], unread = 0): ImageList => ({
  references,
  format,
  unread,
});

const LINES = "# what goes over\n\nalpine:3 # the base\r\n  localhost:5000/a/b\t# c: d\nalpine:3\n";

const DOCUMENTS: Record<string, [content: string, expected: ImageList]> = {
  lines: [LINES, list("lines", ["alpine:3", "localhost:5000/a/b"])],
  "lines that are bad stay lines": [
    "Alpine:\nb\u00fccher\n",
    list("lines", ["Alpine:", "b\u00fccher"]),
  ],
  "helm, as helm create makes it": [
    HELM_COMMON,
    list("yaml", ["docker.io/library/busybox:1.37", "nginx:1.16.0", "busybox"]),
  ],
  "helm, an operator": [
    HELM_OPERATOR,
    list("yaml", [
      `quay.io/org/operator:v0.80.0@${DIGEST}`,
      "registry.corp:5000/team/side_car.app:2",
    ]),
  ],
  "helm, flow style": [
    HELM_FLOW,
    list("yaml", ["one.io/a:1", "two.io/b:2", "two.io/c:3", "three.io/d:4", "four.io/e:5"], 3),
  ],
  "flow style over several lines": [
    FLOW_LINES,
    list("yaml", ["one.io/a:1", "two.io/b:2", "three.io/c:3"], 1),
  ],
  Compose: [COMPOSE, list("yaml", ["ghcr.io/org/shop:2.1", "postgres:17-alpine", "redis:7"])],
  "kubectl get -o yaml": [KUBECTL_LIST, list("yaml", ["registry.k8s.io/pause:3.10"])],
  "kubectl get -o json": [
    JSON.stringify(KUBECTL_JSON, null, 4),
    list("json", ["a:1", "b:2", `c/d:3@${DIGEST}`]),
  ],
  "JSON in one line": [
    JSON.stringify(KUBECTL_JSON),
    list("json", ["a:1", "b:2", `c/d:3@${DIGEST}`]),
  ],
  "several JSON documents": [
    `${JSON.stringify({ image: "a:1" }, null, 2)}\n${JSON.stringify({ x: [{ image: "b:2" }] }, null, 2)}\n`,
    list("yaml", ["a:1", "b:2"]),
  ],
  "a document without images": ["apiVersion: v1\nkind: Service\n", list("yaml", [])],
  "Windows line ends": [
    COMPOSE.replaceAll("\n", "\r\n"),
    list("yaml", ["ghcr.io/org/shop:2.1", "postgres:17-alpine", "redis:7"]),
  ],
  "words that cannot be pulled are handed on, so that they are named": [
    // biome-ignore lint/suspicious/noTemplateCurlyInString: Compose's own
    "services:\n  a:\n    image: org/app:${TAG:-1}\n",
    list("yaml", ["org/app:${" + "TAG:-1}"]),
  ],
  "an empty file": ["", list("lines", [])],
};

for (const [name, [content, expected]] of Object.entries(DOCUMENTS)) {
  test(`a list of images: ${name}`, () => {
    assert.deepEqual(parseImageList(content), expected);
    assert.deepEqual(parseImageList(Buffer.from(content)), expected);
  });
}

const UTF16 = {
  "UTF-16, as PowerShell 5 writes it": Buffer.from(`\ufeff${LINES}`, "utf16le"),
  "UTF-16, big end first": Buffer.from(`\ufeff${LINES}`, "utf16le").swap16(),
  "UTF-8 with a byte order mark": Buffer.from(`\ufeff${LINES}`),
};

for (const [name, bytes] of Object.entries(UTF16)) {
  test(`a lock file in ${name}`, () => {
    assert.deepEqual(parseImageList(bytes), list("lines", ["alpine:3", "localhost:5000/a/b"]));
  });
}

test("a document of a million braces is read in time", () => {
  const deep = `${'{"a":'.repeat(5000)}{"image":"deep:1"}${"}".repeat(5000)}`;
  assert.deepEqual(parseImageList(deep), list("json", ["deep:1"]));
  const started = performance.now();
  parseImageList(`a: b\nc: ${"[{".repeat(500_000)}`);
  parseImageList(`a: b\nc: ${'"\\"'.repeat(300_000)}\n`);
  parseImageList(`a: b\n${"- ".repeat(500_000)}x\n`);
  parseImageList(`a: b\n${" ".repeat(500_000)}x\n${"image ".repeat(100_000)}\n`);
  assert.ok(performance.now() - started < 5000);
});

test("--from with YAML: the same tar as by name; stderr says how many, and what is not seen", async (t) => {
  const { references, folder } = await serveBundle(t);
  const [first, second] = references;
  const document = `kind: List\nitems:\n- image: ${second}\n- image: "${first}"\n- image: *x\n- image: ${first}\n`;
  const file = join(folder, "all.yaml");
  writeFileSync(file, document);
  const words = ["-q", "-s", "http", "--platform", "linux/amd64"];
  const byName = await runMain([second, first, join(folder, "a.tar"), ...words]);
  const byFile = await runMain(["--from", file, join(folder, "b.tar"), ...words]);
  assert.equal(byFile.exitCode, 0, byFile.stderr);
  assert.equal(String(byFile.stdout), String(byName.stdout));
  assert.equal(
    byFile.stderr,
    `imgpull: ${file}: 2 different images in image: values, 1 more value could not be read; ` +
      "images named elsewhere are not seen (arguments, custom resources)\n",
  );
  const none = await runMain(["--from", "-", "b.tar"], { stdin: "kind: Service\nspec: {}\n" });
  assert.equal(none.exitCode, 2);
  assert.match(none.stderr, /^imgpull: --from -: there is no image: value in it/);

  const lock = join(folder, "images.lock");
  writeFileSync(lock, Buffer.from(`\ufeff${byName.stdout}`, "utf16le"));
  const locked = await runMain(["--from", lock, join(folder, "c.tar"), ...words]);
  assert.equal(String(locked.stdout), String(byName.stdout), locked.stderr);
});
