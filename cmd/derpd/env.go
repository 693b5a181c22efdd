package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// printEnvironment is the command `derpd env`.
func printEnvironment(args, env []string, stdout, stderr io.Writer) error {
	flags := newFlags("env", stderr)
	example := flags.Bool("example", false, "print an environment file to fill in")
	if err := parseFlags(flags, args); err != nil {
		return err
	}
	if *example {
		_, err := io.WriteString(stdout, exampleFile())
		return err
	}
	c, err := loadConfig(env)
	decided := make(map[string]string)
	if err == nil {
		decided = c.decided()
	}
	if _, err := io.WriteString(stdout, c.loaded.effective(decided)); err != nil {
		return err
	}
	if err != nil {
		return configError(err)
	}
	return nil
}

// decided are the values of variables whose default is not one value. What is
// known only when the relay runs is not among them.
func (c *config) decided() map[string]string {
	values := map[string]string{
		"DERP_HTTP_PORT": strconv.Itoa(cmp.Or(portOf(c.httpAddr), -1)),
		"DERP_CERT_DIR":  c.certDir,
		"DERP_CERT_MODE": c.mode,
		"DERP_NODE_NAME": c.node.Name,
	}
	switch c.mode {
	case modeManual:
		values["DERP_CERT_FILE"], values["DERP_KEY_FILE"] = c.manual.CertFile, c.manual.KeyFile
	case modeLetsEncrypt:
		values["DERP_ACME_CA"] = "letsencrypt"
		values["DERP_ACME_CHALLENGES"] = c.loaded.challenges()
	}
	return values
}

// effective lists every variable with its value and where that came from. Of
// the DNS providers' it lists what was given and what the chosen one wants.
// Where the default is not one value, decided has it.
func (l *loaded) effective(decided map[string]string) string {
	var b strings.Builder
	list := l.variables()
	for _, v := range credentialVariables() {
		if l.given[v.name] || v.provider == l.DNS {
			v.value = l.credentials[v.name]
			if v.value == "" {
				v.value = v.fallback
			}
			list = append(list, v)
		}
	}
	for _, v := range list {
		source := "default"
		if path, ok := l.fromFile[v.name]; ok {
			source = "from " + path
		} else if l.given[v.name] {
			source = "set"
		} else if slices.Contains(l.assumed, v.name) {
			source = l.platform.name
		}
		value := v.shown()
		if value == "" && v.computed != "" {
			source += ": " + v.computed
			value = decided[v.name]
		}
		fmt.Fprintf(&b, "%s=%s  # %s\n", v.name, value, source)
	}
	return b.String()
}

// exampleFile is docker/env.example.
func exampleFile() string {
	var b strings.Builder
	b.WriteString(`# Copy this file to .env beside compose.yaml and uncomment what you need.
# Each variable can be given as a file: NAME_FILE=/run/secrets/name.
# Made by: derpd env --example
`)
	for _, v := range (environment{}).variables() {
		fmt.Fprintf(&b, "\n# %s\n", v.en)
		if v.computed != "" {
			fmt.Fprintf(&b, "# default: %s\n", v.computed)
		}
		fmt.Fprintf(&b, "#%s=%s\n", v.name, v.fallback)
	}
	provider := ""
	for _, v := range credentialVariables() {
		if v.provider != provider {
			provider = v.provider
			fmt.Fprintf(&b, "\n# --- DERP_DNS_PROVIDER=%s ---\n", provider)
		}
		optional := ""
		if !v.required {
			optional = " (optional)"
		}
		fmt.Fprintf(&b, "# %s%s\n#%s=%s\n", v.en, optional, v.name, v.fallback)
	}
	return b.String()
}

// table is the table of variables in README.md ("en") and README.zh-CN.md
// ("zh").
func table(language string) string {
	var b strings.Builder
	if language == "zh" {
		b.WriteString("| 变量 | 默认值 | 含义 |\n|---|---|---|\n")
	} else {
		b.WriteString("| variable | default | meaning |\n|---|---|---|\n")
	}
	for _, v := range (environment{}).variables() {
		meaning, fallback := v.en, v.computed
		if language == "zh" {
			meaning, fallback = v.zh, v.zhHow
		}
		if v.fallback != "" {
			fallback = "`" + v.fallback + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", v.name, fallback, meaning)
	}
	return b.String()
}

// providerTable is the table of the DNS providers' credentials in README.md
// ("en") and README.zh-CN.md ("zh").
func providerTable(language string) string {
	var b strings.Builder
	optional := "optional"
	if language == "zh" {
		b.WriteString("| 服务商 | 变量 | 默认值 | 含义 |\n|---|---|---|---|\n")
		optional = "可选"
	} else {
		b.WriteString("| provider | variable | default | meaning |\n|---|---|---|---|\n")
	}
	shown := ""
	for _, v := range credentialVariables() {
		cell, meaning, fallback := "", v.en, ""
		if v.provider != shown {
			shown = v.provider
			cell = "`" + v.provider + "`"
		}
		if language == "zh" {
			meaning = v.zh
		}
		switch {
		case v.fallback != "":
			fallback = "`" + v.fallback + "`"
		case !v.required:
			fallback = optional
		}
		fmt.Fprintf(&b, "| %s | `%s` | %s | %s |\n", cell, v.name, fallback, meaning)
	}
	return b.String()
}
