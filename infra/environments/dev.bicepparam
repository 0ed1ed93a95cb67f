using '../main.bicep'

// For trying things out: two spot nodes of the size that is easiest to get, cheap storage, logs for a month.
param namePrefix = readEnvironmentVariable('TOKENMILL_PREFIX', 'tkm')
param environmentName = 'dev'
param workerSize = 'Standard_ND96asr_v4'
param maxWorkers = 2
param spotWorkers = true
param maxDriverNodes = 1
param imageTag = readEnvironmentVariable('TOKENMILL_IMAGE_TAG', '0.1.0')
param storageSku = 'Standard_LRS'
param undeleteDays = 7
param logRetentionDays = 30
param logDailyCapGb = 1
param batchServiceObjectId = readEnvironmentVariable('TOKENMILL_BATCH_SERVICE')
param operatorObjectId = readEnvironmentVariable('TOKENMILL_OPERATORS', '')
param sshPublicKey = readEnvironmentVariable('TOKENMILL_SSH_PUBLIC_KEY', '')
param tags = {
  costCenter: 'development'
}
