package config

import (
	"github.com/rs/zerolog"

	"derpd/relay/admit"
)

func init() {
	registerSource(sourceKind{name: "keys", closes: "DERP_ALLOW_KEYS", env: func() sourceEnv { return new(KeysEnv) }})
}

// KeysEnv are the node keys that are admitted.
type KeysEnv struct {
	AllowKeys string `envconfig:"DERP_ALLOW_KEYS" lines:"true" desc:"node keys (nodekey:…) that may connect, or the absolute path of a file of them, which is read again when it changes" zh:"允许连接的节点公钥（nodekey:…），或存放它们的文件的绝对路径，文件改动后自动重读"`
}

// parse reads the keys, from the value or from a file. Both DERP_ALLOW_KEYS=/path
// and DERP_ALLOW_KEYS_FILE=/path name a file, which is read again when it changes.
func (env *KeysEnv) parse(p *problems, shared sharedByAll) parsedSources {
	const variable = "DERP_ALLOW_KEYS"
	if env.AllowKeys == "" {
		return parsedSources{}
	}
	source := Source{Name: "keys", Variable: variable}
	path := shared.files[variable]
	if path != "" {
		source.Variable += "_FILE"
	} else if isPath(env.AllowKeys) {
		path = p.path(variable, env.AllowKeys)
	}
	if path == "" {
		keys, err := admit.ParseKeys(env.AllowKeys)
		if err != nil {
			p.add(variable, "%w; write node keys, or the absolute path of a file of them", err)
		}
		source.New = opened(admit.Keys(keys))
		return parsedSources{list: []Source{source}}
	}
	if _, err := admit.LoadKeys(path); err != nil && !p.has(variable) {
		p.add(source.Variable, "%w%s", err, readHint(err))
	}
	source.Target = path
	source.New = func(log zerolog.Logger) (admit.Source, error) { return admit.KeyFile(path, log) }
	return parsedSources{list: []Source{source}}
}
